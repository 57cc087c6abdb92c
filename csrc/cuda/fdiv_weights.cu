// fdiv_weights.cu: the two launches of fdiv_weights.cuh.
#include "fdiv_weights.cuh"
#include "fdpg/cuda.h"

namespace fdpg::cuda {
namespace {

// Where everything is in a workspace at `at`, and one byte past its end.
std::pair<FdivTiles, std::size_t> lay_out(const FdivWeightsParams& p, unsigned char* at) {
  FdivTiles tiles{};
  tiles.tiles = p.sequences > 0 ? divide_up(p.sequences, kTile) : 1;  // statistics of nobody
  const unsigned char* begin = at;
  auto take = [&](auto*& room, int64_t count) {
    room = reinterpret_cast<std::remove_reference_t<decltype(room)>>(at);
    at += count * sizeof(*room);
  };
  take(tiles.samples, tiles.tiles * kTile);
  take(tiles.sums, tiles.tiles * kTile);
  take(tiles.whole, tiles.tiles);
  take(tiles.bad, tiles.tiles);
  take(tiles.partial, tiles.tiles);
  take(tiles.arrived, 2);
  return {tiles, static_cast<std::size_t>(at - begin)};
}

}  // namespace

std::size_t fdiv_weights_workspace(const FdivWeightsParams& p) {
  return lay_out(p, nullptr).second;
}

Status fdiv_weights(const FdivWeightsParams& p, void* workspace, Stream stream) {
  const FdivTiles tiles = lay_out(p, static_cast<unsigned char*>(workspace)).first;
  const cudaError_t status =
      launch<Begin::kEarly>(reward_samples, tiles.tiles, kTile, 0, stream, p, tiles);
  if (status != cudaSuccess) return status;
  return launch<Begin::kEarly>(weigh_samples, tiles.tiles, kTile, 0, stream, p, tiles);
}

}  // namespace fdpg::cuda
