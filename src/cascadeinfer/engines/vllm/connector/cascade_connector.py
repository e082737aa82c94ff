"""The connector class that vLLM instantiates: once beside the scheduler, once in each worker."""

from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorStats
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.connector import NixlPullConnector
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.kv_cache_interface import KVCacheConfig

from cascadeinfer.engines.vllm.connector import commands
from cascadeinfer.engines.vllm.connector.cores import nap_instead_of_spinning, wake_up_politely
from cascadeinfer.engines.vllm.connector.orphan import end_with_parent
from cascadeinfer.engines.vllm.connector.scheduler_side import CascadeSchedulerSide
from cascadeinfer.engines.vllm.connector.worker_side import CascadeWorkerSide

commands.attach()  # vLLM looks utility calls up on EngineCore; every EngineCore process imports this module


class CascadeConnector(NixlPullConnector):
    """NIXL's pull connector with cut, resume and load report."""

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        """Build our half for this role instead of NIXL's."""
        super(NixlPullConnector, self).__init__(vllm_config, role, kv_cache_config)
        nap_instead_of_spinning()
        wake_up_politely()
        end_with_parent()
        self.connector_scheduler: CascadeSchedulerSide | None = None
        self.connector_worker: CascadeWorkerSide | None = None
        if role == KVConnectorRole.SCHEDULER:
            self.connector_scheduler = CascadeSchedulerSide(vllm_config, self.engine_id, kv_cache_config)
        else:
            self.connector_worker = CascadeWorkerSide(vllm_config, self.engine_id, kv_cache_config)

    def bind_kv_cache_manager(self, kv_cache_manager: KVCacheManager) -> None:
        """Keep a reference to the block pool for reservations and the load report."""
        if self.connector_scheduler is not None:
            self.connector_scheduler.bind(kv_cache_manager)

    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        """Called beside the scheduler once at the end of each step, after the step's output has been processed."""
        if self.connector_scheduler is not None:
            self.connector_scheduler.step_ended()
        return super().get_kv_connector_stats()
