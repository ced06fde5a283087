"""The stages: what each learns and what it costs, a file for each method. `registry` lists them."""
