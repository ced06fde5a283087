"""The networks: denoiser, UNet, motion modules, ControlNets, LoRAs."""
