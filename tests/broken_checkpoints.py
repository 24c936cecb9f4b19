"""State dicts that do not fit. Each function breaks ``saved``, and returns the error that loading it must raise and a
pattern of its message."""

import math

import torch


def no_groups(saved):
    del saved["param_groups"]
    return KeyError, "no 'param_groups', only 'state'"


def no_state(saved):
    del saved["state"]
    return KeyError, "no 'state', only 'param_groups'"


def another_group(saved):
    saved["param_groups"].append(saved["param_groups"][0])
    return ValueError, "different number of parameter groups: 3, the optimizer has 2"


def one_group(saved):
    saved["param_groups"].pop()
    return ValueError, "different number of parameter groups: 1, the optimizer has 2"


def short_group(saved):
    saved["param_groups"][1]["params"].pop()
    return ValueError, r"doesn't match the size of optimizer's group: .*\['param_groups'\]\[1\] has 2 .* has 3"


def group_without_params(saved):
    del saved["param_groups"][1]["params"]
    return KeyError, r"\['param_groups'\]\[1\] has no 'params'"


def group_without_lr(saved):
    del saved["param_groups"][1]["lr"]
    return ValueError, r"\['param_groups'\]\[1\] has no 'lr', only .*'weight_decay'"


def group_of_text(saved):
    saved["param_groups"][1] = "lr"
    return TypeError, r"\['param_groups'\]\[1\] must be a dict, got str"


def groups_as_dict(saved):
    saved["param_groups"] = {0: saved["param_groups"][0], 1: saved["param_groups"][1]}
    return TypeError, r"\['param_groups'\] must be a list, got dict"


def lr_of_text(saved):
    saved["param_groups"][1]["lr"] = "fast"
    return ValueError, r"\['param_groups'\]\[1\].*'fast'"


def lr_of_none(saved):
    saved["param_groups"][1]["lr"] = None
    return TypeError, r"\['param_groups'\]\[1\].*NoneType"


def lr_not_a_number(saved):
    saved["param_groups"][1]["lr"] = math.nan
    return ValueError, r"\['param_groups'\]\[1\]\['lr'\] is nan"


def lr_without_end(saved):
    saved["param_groups"][1]["lr"] = math.inf
    return ValueError, r"\['param_groups'\]\[1\]\['lr'\] is inf"


def lr_tensor_not_a_number(saved):
    saved["param_groups"][1]["lr"] = torch.tensor(math.nan)
    return ValueError, "learning rate: nan in group 1"


def lr_of_two(saved):
    saved["param_groups"][1]["lr"] = torch.ones(2)
    return ValueError, r"lr must be 1-element|group 1|\['param_groups'\]\[1\]"


def parameters_as_number(saved):
    saved["param_groups"][1]["params"] = torch.tensor(2)
    return TypeError, r"\['param_groups'\]\[1\]\['params'\] must be a list, got Tensor"


def repeated_parameter(saved):
    saved["param_groups"][1]["params"][0] = 1
    return ValueError, r"\['param_groups'\]\[1\]\['params'\] lists 1"


def state_as_list(saved):
    saved["state"] = list(saved["state"].values())
    return TypeError, r"\['state'\] must be a dict, got list"


def entry_of_text(saved):
    saved["state"][1] = "momentum"
    return TypeError, r"\['state'\]\[1\] \(parameter 1 of group 0\) must be a dict, got str"


def missing_tensor(saved):
    key = tensors(saved)[-1]
    del saved["state"][1][key]
    return ValueError, rf"\['state'\]\[1\] \(parameter 1 of group 0\) has no '{key}', only .*saved by another"


def wrong_shape(saved):
    key = tensors(saved)[0]
    saved["state"][2][key] = torch.zeros(4, 6)
    return ValueError, rf"\['state'\]\[2\] \(parameter 0 of group 1\)\['{key}'\] has shape \(4, 6\).* \(6, 4\)"


def right_size_wrong_shape(saved):
    key = tensors(saved)[0]
    saved["state"][2][key] = torch.zeros(24)
    return ValueError, rf"\['state'\]\[2\] .*\['{key}'\] has shape \(24,\)"


def number_for_a_tensor(saved):
    key = tensors(saved)[0]
    saved["state"][2][key] = 0.0
    return TypeError, rf"\['state'\]\[2\] .*\['{key}'\] must be a tensor, got float"


def states_of_other_parameters(saved):
    """As from a model with its layers in another order."""
    saved["state"] = {k: saved["state"][(k + 1) % 5] for k in range(5)}
    return ValueError, r"\['state'\]\[0\] \(parameter 0 of group 0\)\['\w+'\] has shape \(7, 5\), the parameter \(\)"


def no_step(saved):
    del saved["state"][1]["step"]
    return ValueError, r"\['state'\]\[1\] .* has no 'step', only "


def step_of_text(saved):
    saved["state"][1]["step"] = "soon"
    return TypeError, r"\['state'\]\[1\] .*\['step'\] must be a number, got 'soon'"


def step_of_two(saved):
    saved["state"][1]["step"] = torch.ones(2)
    return TypeError, r"\['state'\]\[1\] .*\['step'\] must be a number, got tensor"


def step_not_a_number(saved):
    saved["state"][1]["step"] = torch.tensor(math.nan)
    return ValueError, r"\['state'\]\[1\] .*\['step'\] must be a number of steps, got tensor\(nan"


def step_below_zero(saved):
    saved["state"][1]["step"] = -1
    return ValueError, r"\['state'\]\[1\] .*\['step'\] must be a number of steps, got -1"


OF_GROUPS = [
    no_groups, no_state, another_group, one_group, short_group, group_without_params, group_without_lr, group_of_text,
    groups_as_dict, lr_of_text, lr_of_none, lr_not_a_number, lr_without_end, lr_tensor_not_a_number,
    lr_of_two, parameters_as_number, repeated_parameter,
]  # fmt: skip
OF_STATES = [
    state_as_list, entry_of_text, missing_tensor, wrong_shape, right_size_wrong_shape, number_for_a_tensor,
    states_of_other_parameters,
]  # fmt: skip
OF_STEPS = [no_step, step_of_text, step_of_two, step_not_a_number, step_below_zero]


def tensors(saved):
    """The states that have their parameter's shape."""
    return [key for key, value in saved["state"][1].items() if value.dim() == 2]
