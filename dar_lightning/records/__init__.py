"""What is written beside results: protocols, how images were drawn, which code made them."""
