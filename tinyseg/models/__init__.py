"""Residual networks that classify and segment, at any rank: trunks, decoders, whole networks."""

from .decoders import HEADS
from .depth import Builder, Depth
from .networks import DECODER, Classifier, Segmenter, build, register, resnet, resnet_seg
from .resnet import BACKBONES, Residual, ResNet

__all__ = ["BACKBONES", "DECODER", "HEADS", "Builder", "Classifier", "Depth", "ResNet",
           "Residual", "Segmenter", "build", "register", "resnet", "resnet_seg"]
