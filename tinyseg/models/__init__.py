"""Residual networks that classify and segment, at any rank: trunks, decoders, whole networks."""

from .decoders import HEADS
from .depth import Builder, Depth
from .networks import DECODER, Classifier, Segmenter, build, register, resnet, resnet_seg
from .resnet import BACKBONES, Residual, ResNet
from .structures import STRUCTURES

__all__ = ["BACKBONES", "DECODER", "HEADS", "STRUCTURES", "Builder", "Classifier", "Depth",
           "ResNet", "Residual", "Segmenter", "build", "register", "resnet", "resnet_seg"]
