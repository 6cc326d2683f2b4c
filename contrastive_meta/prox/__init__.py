"""Penalties with kinks, and constraints: what a learner minimises beside a smooth loss."""

from contrastive_meta.prox._penalties import box as box
from contrastive_meta.prox._penalties import elastic_net as elastic_net
from contrastive_meta.prox._penalties import group as group
from contrastive_meta.prox._penalties import l1 as l1
from contrastive_meta.prox._penalties import l2_ball as l2_ball
from contrastive_meta.prox._penalties import non_negative as non_negative
from contrastive_meta.prox._penalties import of as of
from contrastive_meta.prox._penalties import simplex as simplex
