"""LM-H: convert pretrained networks to spiking networks, calibrate and fine-tune them."""
