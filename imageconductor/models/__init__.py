"""The networks: UNet, image ControlNet, motion ControlNet and its two LoRAs."""
