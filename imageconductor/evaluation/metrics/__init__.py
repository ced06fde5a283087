"""What is measured of videos, whatever was asked: motion, overlap with boxes, appearance, Fréchet distances."""
