"""What is specific to CUDA and needs neither torch nor the serving side: the driver API, MPS, the devices."""
