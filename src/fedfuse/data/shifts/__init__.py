"""Changes to what clients see: what a method must withstand."""

from fedfuse.data.shifts.backdoor import NUM_SHAPES, shape_masks, stamp_shapes

__all__ = ["NUM_SHAPES", "shape_masks", "stamp_shapes"]
