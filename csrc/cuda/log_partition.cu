// log_partition.cu: the launch of log_partition.cuh.
#include "fdpg/cuda.h"
#include "log_partition.cuh"

namespace fdpg::cuda {

Status log_partition(const LogPartitionParams& p, Stream stream) {
  return launch<Begin::kEarly>(add_weights, partition_blocks(p), kPartitionThreads, 0, stream, p);
}

}  // namespace fdpg::cuda
