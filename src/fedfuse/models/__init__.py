"""Model families, what can be built from parts of them, and how any model is cut."""

from fedfuse.models import autoencoder as autoencoder
from fedfuse.models import blocks as blocks
from fedfuse.models import cnn as cnn
from fedfuse.models import combined as combined
from fedfuse.models import ensemble as ensemble
from fedfuse.models import foundation as foundation
from fedfuse.models import fused as fused
from fedfuse.models import graph as graph
from fedfuse.models import headed as headed
from fedfuse.models import low_rank as low_rank
from fedfuse.models import mixture as mixture
from fedfuse.models import mlp as mlp
from fedfuse.models import normalized as normalized
from fedfuse.models import prototypes as prototypes
from fedfuse.models import python_file as python_file
from fedfuse.models import random_features as random_features
from fedfuse.models import resnet as resnet
from fedfuse.models import small as small
from fedfuse.models import timm as timm
from fedfuse.models import torchvision as torchvision
from fedfuse.models import vit as vit
from fedfuse.models.family import family as family
from fedfuse.models.family import spec as spec
from fedfuse.models.family import with_width as with_width
from fedfuse.models.foundation import placing as placing
