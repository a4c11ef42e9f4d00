"""megatron-core's layer of experts with our dispatchers, and the experts' seam in a layer spec."""

from typing import Any, NamedTuple

from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.spec_utils import ModuleSpec

from model_providers.dispatch import AllToAll, HierarchicalAllToAll, Nodes
from model_providers.experts import GroupedExperts
from model_providers.layout import Layout
from model_providers.router import Router


class ExpertPlace(NamedTuple):
    """Where experts live: what an expert layer must know besides megatron-core's config."""

    groups: Any  # process groups: tp, ep, expt_tp, tp_ep, tp_cp, tp_dp_cp, ...
    layout: Layout
    nodes: Nodes | None = None  # for the hierarchical dispatcher, and for counting traffic


class ExpertLayer(MoELayer):
    """Router, dispatcher, experts and shared experts; [s b h] -> [s b h].

    Not used itself: `expert_layer` makes a subclass that knows its place, because megatron-core's TransformerLayer
    hands groups to classes of its own only, and remarks on every other layer spec.
    """

    place: ExpertPlace
    parts: MoESubmodules

    def __init__(self, config: Any):
        place = self.place
        super().__init__(config, self.parts, pg_collection=place.groups)
        if place.layout.dispatcher == "allgather":
            return
        kind = HierarchicalAllToAll if place.layout.dispatcher == "hierarchical" else AllToAll
        self.token_dispatcher = kind(
            self.num_local_experts,
            self.local_expert_indices,
            config=config,
            pg_collection=place.groups,
            nodes=place.nodes,
        )


def expert_layer(
    place: ExpertPlace, shared: MLPSubmodules, experts: type[GroupedExperts] = GroupedExperts
) -> type[ExpertLayer]:
    """``shared``: the linears and the activation of the shared experts, as of a dense MLP."""
    parts = MoESubmodules(
        router=Router,
        experts=ModuleSpec(module=experts),
        shared_experts=ModuleSpec(module=SharedExpertMLP, submodules=shared),
    )
    return type("ExpertLayer", (ExpertLayer,), {"place": place, "parts": parts})
