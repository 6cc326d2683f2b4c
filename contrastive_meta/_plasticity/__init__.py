"""Plasticity rules: what each phase measures."""

from contrastive_meta._plasticity.autodiff import Autodiff as Autodiff
from contrastive_meta._plasticity.autodiff import PlasticityRule as PlasticityRule
