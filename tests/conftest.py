"""One thread for every test: tiny tensors gain nothing from more, and busy machines stay quick."""

import torch

torch.set_num_threads(1)
