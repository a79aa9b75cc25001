"""A federation on Flower: what crosses, the server's side, the clients' side. Nothing here imports Flower by itself."""
