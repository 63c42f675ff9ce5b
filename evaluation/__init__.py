"""How good is an encoder: kNN and linear classifiers on its features."""
