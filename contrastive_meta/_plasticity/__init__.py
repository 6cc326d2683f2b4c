"""Plasticity rules: what each phase measures, and the proof that it is local."""

from contrastive_meta._plasticity.anchored_synapse import AnchoredSynapse as AnchoredSynapse
from contrastive_meta._plasticity.autodiff import Autodiff as Autodiff
from contrastive_meta._plasticity.autodiff import PlasticityRule as PlasticityRule
from contrastive_meta._plasticity.bufferless import BufferlessContrast as BufferlessContrast
from contrastive_meta._plasticity.by_group import ByGroup as ByGroup
from contrastive_meta._plasticity.context import Context as Context
from contrastive_meta._plasticity.fast_head import FastHead as FastHead
from contrastive_meta._plasticity.gain_modulation import GainModulation as GainModulation
from contrastive_meta._plasticity.local_rule import LocalRule as LocalRule
from contrastive_meta._plasticity.local_rule import Signal as Signal
from contrastive_meta._plasticity.locality import LocalityReport as LocalityReport
from contrastive_meta._plasticity.locality import NotLocalError as NotLocalError
from contrastive_meta._plasticity.locality import check_local as check_local
from contrastive_meta._plasticity.module_bank import ModuleBank as ModuleBank
from contrastive_meta._plasticity.online import OnlineContrast as OnlineContrast
from contrastive_meta._plasticity.plasticity_mask import PlasticityMask as PlasticityMask
from contrastive_meta._plasticity.transmission import transmit as transmit
