"""Who works: workers in processes of their own, on the GPUs of this machine or of a Ray cluster."""
