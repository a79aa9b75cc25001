"""Ways to say the tensors of an upload in fewer bytes; one file each."""

from fedfuse.core.codecs.codec import Codec as Codec
from fedfuse.core.codecs.int8 import Int8 as Int8
from fedfuse.core.codecs.ternary import Ternary as Ternary
from fedfuse.core.codecs.topk import TopK as TopK
