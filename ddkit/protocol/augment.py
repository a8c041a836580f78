"""`ddkit.network.augment` under the import path that notebooks use."""

from ddkit.network.augment import brightness as brightness
from ddkit.network.augment import contrast as contrast
from ddkit.network.augment import crop as crop
from ddkit.network.augment import cutout as cutout
from ddkit.network.augment import flip as flip
from ddkit.network.augment import random_augment as random_augment
from ddkit.network.augment import rotate as rotate
from ddkit.network.augment import saturation as saturation
from ddkit.network.augment import scale as scale
