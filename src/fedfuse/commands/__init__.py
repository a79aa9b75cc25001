"""What single commands do that belongs to no other room."""
