"""Dataset files to examples, token ids and minibatches."""
