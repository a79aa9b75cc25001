"""Pure maths that methods share: tensors in, tensors out."""
