"""What makes a model of Hugging Face transformers run over a group's ranks: `hpcmoe.hf` is its face."""
