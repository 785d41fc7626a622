from .clip import TextEncoder as TextEncoder
from .conditioning import Conditioning as Conditioning
from .configs import TextConfig as TextConfig
from .configs import UNetConfig as UNetConfig
from .configs import VAEConfig as VAEConfig
from .unet import UNet as UNet
from .vae import VAE as VAE
