"""How good a bundle's pictures are: distances and scores over image features."""
