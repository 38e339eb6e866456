"""One augmentation, drawn once and applied to real and synthetic images alike."""
