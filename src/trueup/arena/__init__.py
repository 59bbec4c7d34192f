"""Models compared blindly by people, and by judges beside them."""
