// log_partition.cu: the launch of log_partition.cuh.
#include "fdpg/cuda.h"
#include "log_partition.cuh"

namespace fdpg::cuda {

Status log_partition(const LogPartitionParams& p, Stream stream) {
  const int64_t blocks = is_by_sample(p) ? p.sequences : p.prompts;
  return launch<Begin::kEarly>(add_weights, blocks, kPartitionThreads, 0, stream, p);
}

}  // namespace fdpg::cuda
