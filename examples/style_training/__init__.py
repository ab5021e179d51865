"""What ``train_style.py`` is made of: VGG-19 features, the perceptual loss, and the content pictures."""
