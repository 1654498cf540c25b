"""What a network is: plain numbers, without tensors and without torch."""
