"""Network with sub-networks (Fuengfusin & Tamukoh, 2020) as a layerlab strategy."""

from layerlab_network_with_subnetworks.method.chain import detach
from layerlab_network_with_subnetworks.method.networks import convolutional_chain, perceptron
from layerlab_network_with_subnetworks.strategy import NetworkWithSubnetworks

__all__ = ["NetworkWithSubnetworks", "convolutional_chain", "detach", "perceptron"]
