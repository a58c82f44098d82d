"""What a WAN on disk is: reading it, checking it, naming its tensors, and writing one that every reader opens."""
