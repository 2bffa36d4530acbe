"""How row blocks are planned, and what runs them."""
