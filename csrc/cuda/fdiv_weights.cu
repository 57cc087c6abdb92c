// fdiv_weights.cu: the two launches of fdiv_weights.cuh.
#include "fdiv_weights.cuh"
#include "fdpg/cuda.h"

namespace fdpg::cuda {

std::size_t fdiv_weights_workspace(const FdivWeightsParams& p) {
  return p.sequences * (sizeof(SampleReward) + sizeof(RewardSums));
}

Status fdiv_weights(const FdivWeightsParams& p, void* workspace, Stream stream) {
  RewardSums* others = static_cast<RewardSums*>(workspace);
  SampleReward* samples = reinterpret_cast<SampleReward*>(others + p.sequences);
  const cudaError_t status = launch(reward_samples, divide_up(p.sequences, kRewardThreads),
                                    kRewardThreads, 0, stream, p, samples);
  if (status != cudaSuccess) return status;
  const int64_t wanted = round_up(p.sequences > 0 ? p.sequences : 1, kWarp);
  const int threads = static_cast<int>(wanted < kWeighThreads ? wanted : kWeighThreads);
  return launch(weigh_samples, 1, threads, 0, stream, p, samples, others);
}

}  // namespace fdpg::cuda
