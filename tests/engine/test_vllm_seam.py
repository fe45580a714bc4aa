"""The names of vLLM that the adapter touches: a version that lacks one fails here, by name, before anywhere else."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from sllm.core.engine_args import ENGINE_ARGS, Taker
from sllm.core.runtime_layout import SAVED_ARCHITECTURES
from sllm.errors import EngineFailed, InvalidArgument

pytestmark = pytest.mark.vllm

NAMES = [
    ("vllm._custom_ops", "_supports_onednn"),
    ("vllm.config.logging", "LoggingConfig"),
    ("vllm.engine.arg_utils", "EngineArgs.add_cli_args"),
    ("vllm.engine.arg_utils", "EngineArgs.from_cli_args"),
    ("vllm.engine.arg_utils", "EngineArgs.create_engine_config"),
    ("vllm.exceptions", "VLLMClientError"),
    ("vllm.logger", "configure_logging_if_needed"),
    ("vllm.model_executor.model_loader", "register_model_loader"),
    ("vllm.model_executor.model_loader.default_loader", "DefaultModelLoader.get_all_weights"),
    ("vllm.model_executor.model_loader.default_loader", "DefaultModelLoader.download_model"),
    ("vllm.model_executor.model_loader.default_loader", "DefaultModelLoader.load_weights"),
    ("vllm.model_executor.model_loader.default_loader", "DefaultModelLoader.track_weights_loading"),
    ("vllm.model_executor.model_loader.default_loader", "DefaultModelLoader.counter_before_loading_weights"),
    ("vllm.model_executor.models", "ModelRegistry.models"),
    ("vllm.model_executor.models", "ModelRegistry.register_model"),
    ("vllm.model_executor.models", "ModelRegistry.get_supported_archs"),
    ("vllm.platforms", "current_platform.is_cpu"),
    ("vllm.platforms", "current_platform.register_triton_kernel_overrides"),
    ("vllm.plugins", "load_general_plugins"),
    ("vllm.sampling_params", "SamplingParams.verify"),
    ("vllm.usage.usage_lib", "UsageContext.ENGINE_CONTEXT"),
    ("vllm.v1.core.kv_cache_manager", "KVCacheManager.get_computed_blocks"),
    ("vllm.v1.core.sched.scheduler", "Scheduler.get_request_counts"),
    ("vllm.v1.core.sched.utils", "check_stop"),
    ("vllm.utils.argparse_utils", "FlexibleArgumentParser"),
    ("vllm.utils.cpu_resource_utils", "_get_cpu_list"),
    ("vllm.utils.cpu_resource_utils", "get_allowed_cpu_list"),
    ("vllm.v1.engine.core", "EngineCore.preprocess_add_request"),
    ("vllm.v1.engine.core", "EngineCore.add_request"),
    ("vllm.v1.engine.core", "EngineCore.abort_requests"),
    ("vllm.v1.engine.core", "EngineCore.post_step"),
    ("vllm.v1.executor.uniproc_executor", "UniProcExecutor._distributed_args"),
    ("vllm.v1.structured_output", "StructuredOutputManager.grammar_init"),
    ("vllm.v1.request", "Request.append_output_token_ids"),
    ("vllm.v1.request", "Request.get_finished_reason"),
    ("vllm.v1.structured_output", "StructuredOutputManager.accept_tokens"),
    ("vllm.v1.structured_output.request", "StructuredOutputRequest.grammar"),
    ("vllm.v1.sample.thinking_budget_state", "ThinkingBudgetStateHolder._update_think_state"),
    ("vllm.v1.worker.gpu_input_batch", "CachedRequestState"),
    ("vllm.v1.worker.gpu_model_runner", "CachedRequestState"),
]


@pytest.mark.parametrize(("module", "path"), NAMES, ids=lambda value: value)
def test_every_name_of_vllm_that_is_used_exists(vllm: SimpleNamespace, module: str, path: str) -> None:
    found: Any = importlib.import_module(module)
    for name in path.split("."):
        found = getattr(found, name)


def test_names_set_at_run_time_are_still_set_there(vllm: SimpleNamespace) -> None:
    """Attributes of instances cannot be looked up on a class: look for them where they are assigned."""
    core = inspect.getsource(importlib.import_module("vllm.v1.engine.core").EngineCore.__init__)
    for name in (
        "self.step_fn",
        "self.structured_output_manager",
        "self.scheduler",
        "self.vllm_config",
        "self.batch_queue",
    ):
        assert f"{name} = " in core or f"{name}: " in core, name
    scheduler = inspect.getsource(importlib.import_module("vllm.v1.core.sched.scheduler").Scheduler.__init__)
    assert "self.max_num_running_reqs = " in scheduler
    executor = importlib.import_module("vllm.v1.executor.uniproc_executor").UniProcExecutor
    assert "self._distributed_args()" in inspect.getsource(executor._init_executor)
    manager = inspect.getsource(importlib.import_module("vllm.v1.structured_output").StructuredOutputManager)
    assert "self._use_async_grammar_compilation = " in manager
    assert "skip_tokenizer_init" in manager


def test_every_module_that_is_imported_ahead_exists(vllm: SimpleNamespace) -> None:
    for module in (*vllm.setup._LAZY_MODULES, *vllm.setup._LAZY_CPU_MODULES):
        importlib.import_module(module)


def test_every_architecture_that_is_saved_is_known(vllm: SimpleNamespace) -> None:
    registry = importlib.import_module("vllm.model_executor.models").ModelRegistry
    assert set(SAVED_ARCHITECTURES) <= set(registry.get_supported_archs())


def test_the_installed_version_is_a_tested_one(vllm: SimpleNamespace) -> None:
    assert vllm.setup.installed_version() in vllm.setup.TESTED_VERSIONS


def test_an_untested_version_is_refused(vllm: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm.setup, "TESTED_VERSIONS", ("0.0.1",))
    with pytest.raises(EngineFailed, match="tested with"):
        vllm.setup.installed_version()


def test_every_engine_argument_that_an_engine_takes_is_a_flag_of_vllm(vllm: SimpleNamespace) -> None:
    flags = {flag for action in vllm.args.parser()._actions for flag in action.option_strings}
    wanted = [name for name, taker in ENGINE_ARGS.items() if taker & Taker.ENGINE]
    assert [name for name in wanted if f"--{name.replace('_', '-')}" not in flags] == []


def test_the_request_struct_has_the_fields_that_are_set(vllm: SimpleNamespace) -> None:
    fields = set(vllm.engine_types.EngineCoreRequest.__struct_fields__)
    assert {"request_id", "prompt_token_ids", "sampling_params", "cache_salt", "priority", "reasoning_ended"} <= fields


def test_the_output_struct_has_no_field_that_is_silently_left_out(
    vllm: SimpleNamespace, make_launch: Callable[..., Any]
) -> None:
    """A new field may carry what a client is owed: decide on it, then add it here."""
    carried = {
        "request_id",
        "new_token_ids",
        "new_logprobs",
        "new_prompt_logprobs_tensors",
        "finish_reason",
        "stop_reason",
        "prefill_stats",
    }
    not_for_text_generation = {
        "pooling_output",
        "events",
        "kv_transfer_params",
        "ec_transfer_params",
        "trace_headers",
        "routed_experts",
        "num_nans_in_logits",
        "mm_cache_miss_hashes",
        "new_sampling_mask",
        "spec_decode_metrics",
        "prompt_token_id_logprobs",
    }
    assert set(vllm.engine_types.EngineCoreOutput.__struct_fields__) == carried | not_for_text_generation


def test_finish_reasons_have_the_same_names(vllm: SimpleNamespace) -> None:
    from sllm.core.tokens import FinishReason

    assert [reason.name for reason in vllm.engine_types.FinishReason] == [reason.name for reason in FinishReason]


def test_prefill_statistics_have_what_is_read(vllm: SimpleNamespace) -> None:
    stats = importlib.import_module("vllm.v1.metrics.stats").PrefillStats
    assert {"num_prompt_tokens", "num_cached_tokens"} <= {field.name for field in dataclasses.fields(stats)}


def test_what_users_sent_is_not_logged_when_a_step_fails(vllm: SimpleNamespace) -> None:
    from vllm.logging_utils import dump_input

    vllm.setup.keep_requests_out_of_logs()
    assert dump_input.logger.disabled


# --- resuming (vllm_resume) ----------------------------------------------------------------


@pytest.fixture
def resume(vllm: SimpleNamespace) -> Any:
    return importlib.import_module("sllm.engine.vllm_resume")


def test_the_scheduler_hands_a_workers_request_the_very_prompt_that_it_was_given(resume: Any) -> None:
    """The output travels in it: a copy would lose the output without a word."""
    request = made(resume, [5, 6, 7], had=2)
    data = importlib.import_module("vllm.v1.core.sched.output").NewRequestData.from_request(request, ([],))
    assert data.prompt_token_ids is request.prompt_token_ids
    assert isinstance(data.prompt_token_ids, resume.ResumedPrompt)


def test_a_request_that_has_had_output_looks_as_if_it_had_been_preempted(resume: Any) -> None:
    request = made(resume, [5, 6, 7], had=2)
    resume.replay(request, None)
    assert list(request.prompt_token_ids) == [5]
    assert list(request.output_token_ids) == [6, 7]
    assert list(request.all_token_ids) == [5, 6, 7]
    assert (request.num_prompt_tokens, request.num_tokens, request.num_computed_tokens) == (1, 3, 0)
    assert request.prefill_stats is None


def test_a_grammar_is_told_of_the_output_as_the_scheduler_tells_it(resume: Any) -> None:
    """A token a time, when the request has it: so the end of reasoning is found where it was."""
    told: list[tuple[list[int], list[int]]] = []

    class Grammars:
        def accept_tokens(self, request: Any, new: list[int]) -> bool:
            told.append((list(request.output_token_ids), new))
            return len(told) < 3  # the third is refused

    structured = importlib.import_module("vllm.sampling_params").StructuredOutputsParams(regex="a+")
    request = made(resume, [5, 6, 7], had=2, structured_outputs=structured)
    resume.replay(request, Grammars())
    assert told == [([6], [6]), ([6, 7], [7])]
    with pytest.raises(InvalidArgument):
        resume.replay(made(resume, [5, 6, 7], had=2, structured_outputs=structured), Grammars())


def test_the_runner_makes_its_state_with_the_name_that_is_replaced(vllm: SimpleNamespace) -> None:
    runner = importlib.import_module("vllm.v1.worker.gpu_model_runner")
    source = inspect.getsource(runner.GPUModelRunner._update_states)
    assert "req_state = CachedRequestState(" in source
    assert "prompt_token_ids=new_req_data.prompt_token_ids" in source


def test_the_runners_state_is_split_and_its_generator_brought_on(resume: Any) -> None:
    import torch

    state_class = resume._state_class(100)
    expected = torch.Generator().manual_seed(3)
    for _ in range(2):
        torch.randint(0, 2**31, (1,), generator=expected, dtype=torch.long)
    state = state_class(
        req_id="1",
        prompt_token_ids=resume.ResumedPrompt([5], [6, 7]),
        mm_features=[],
        sampling_params=None,
        generator=torch.Generator().manual_seed(3),
        block_ids=([],),
        num_computed_tokens=0,
        output_token_ids=[],
    )
    assert (state.prompt_token_ids, state.output_token_ids, state.num_tokens) == ([5], [6, 7], 3)
    assert torch.equal(state.generator.get_state(), expected.get_state())


def test_a_vllm_that_is_made_otherwise_is_refused(resume: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resume, "_STATE_FIELDS", {"generator", "no_such_field"})
    with pytest.raises(EngineFailed, match="no_such_field") as refused:
        resume.install(100)
    assert "pip install" in refused.value.hint


def made(resume: Any, token_ids: list[int], *, had: int, **params: Any) -> Any:
    """Return vLLM's Request for one that has had output."""
    from vllm.sampling_params import SamplingParams

    return resume.Request(
        request_id="1",
        prompt_token_ids=resume.ResumedPrompt(token_ids[:-had], token_ids[-had:]),
        sampling_params=SamplingParams(max_tokens=9, **params),
        pooling_params=None,
    )
