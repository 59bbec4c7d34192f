"""Load and save Hugging Face models, run them packed, and read log-probs, values and scores from them."""
