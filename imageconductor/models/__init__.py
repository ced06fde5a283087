"""What computes: denoiser, UNet, ControlNets, motion modules, LoRAs."""
