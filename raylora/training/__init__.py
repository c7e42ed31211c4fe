"""Adapters: their products, gradients, losses and steps."""
