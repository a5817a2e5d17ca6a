#include "pack.h"

#include <algorithm>
#include <cstddef>
#include <numeric>
#include <stdexcept>
#include <string>

namespace slap_fast {
namespace {

// Free tokens of every bin that could be needed, opened or not, under the maximum of each range of
// bins: the first bin with room is one walk down from the root.
class FreeTokens {
 public:
  FreeTokens(std::size_t bins, std::int64_t max_tokens) {
    while (leaves_ < bins) leaves_ *= 2;
    most_.assign(2 * leaves_, max_tokens);
  }

  std::size_t first_with(std::int64_t length) const {
    std::size_t node = 1;
    while (node < leaves_) node = 2 * node + (most_[2 * node] < length);
    return node - leaves_;
  }

  std::int64_t operator[](std::size_t bin) const { return most_[leaves_ + bin]; }

  void take(std::size_t bin, std::int64_t tokens) {
    std::size_t node = leaves_ + bin;
    most_[node] -= tokens;
    while (node /= 2) most_[node] = std::max(most_[2 * node], most_[2 * node + 1]);
  }

 private:
  std::size_t leaves_ = 1;
  std::vector<std::int64_t> most_;  // node i has children 2i and 2i + 1; the leaves are the bins
};

std::vector<std::int64_t> longest_first(const std::vector<std::int64_t>& lengths) {
  std::vector<std::int64_t> order(lengths.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](std::int64_t a, std::int64_t b) { return lengths[a] > lengths[b]; });
  return order;
}

}  // namespace

Bins pack(const std::vector<std::int64_t>& lengths, std::int64_t max_tokens) {
  const std::size_t n = lengths.size();
  for (std::size_t i = 0; i < n; ++i) {
    if (lengths[i] < 0 || lengths[i] > max_tokens) {
      throw std::invalid_argument("lengths[" + std::to_string(i) + "]: found " +
                                  std::to_string(lengths[i]) +
                                  ", expected 0 .. max_tokens = " + std::to_string(max_tokens));
    }
  }
  const std::vector<std::int64_t> order = longest_first(lengths);
  FreeTokens free_tokens(n, max_tokens);
  std::vector<std::size_t> bin_of(n);  // by place in `order`
  Bins bins{std::vector<std::int64_t>(n), {0}};
  for (std::size_t place = 0; place < n;) {
    const std::int64_t length = lengths[order[place]];
    const std::size_t bin = free_tokens.first_with(length);
    // No bin before this one has room for the length, so all equal lengths that fit go here.
    std::int64_t room = free_tokens[bin];
    while (place < n && lengths[order[place]] == length && length <= room) {
      room -= length;
      bin_of[place++] = bin;
    }
    free_tokens.take(bin, free_tokens[bin] - room);
    if (bin + 2 > bins.offsets.size()) bins.offsets.push_back(0);
  }
  // A counting sort by bin keeps the order of placement.
  for (const std::size_t bin : bin_of) ++bins.offsets[bin + 1];
  std::partial_sum(bins.offsets.begin(), bins.offsets.end(), bins.offsets.begin());
  std::vector<std::int64_t> next = bins.offsets;
  for (std::size_t place = 0; place < n; ++place) {
    bins.indices[next[bin_of[place]]++] = order[place];
  }
  return bins;
}

}  // namespace slap_fast
