// What convolutions and products share.

#pragma once

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "oneapi/dnnl/dnnl.hpp"
#include "xla/ffi/api/ffi.h"

#if DNNL_VERSION_MAJOR != 3 || DNNL_CPU_THREADING_RUNTIME != DNNL_RUNTIME_OMP
#error "needs oneDNN 3 with OpenMP"
#endif

namespace resnet_jax {

namespace ffi = xla::ffi;
using dnnl::memory;
using Numbers = std::vector<int64_t>;

inline const dnnl::engine& Cpu() {
  static const dnnl::engine cpu(dnnl::engine::kind::cpu, 0);
  return cpu;
}

// XLA's threads share the work; OpenMP's own would come on top of them.
class OneThread {
 public:
  OneThread() { omp_set_num_threads(1); }
  ~OneThread() { omp_set_num_threads(before_); }

 private:
  const int before_ = omp_get_max_threads();
};

// Calls `run` for all numbers below `count`, also on XLA's threads.
inline void Share(ffi::ThreadPool& pool, int64_t count,
                  std::function<void(int64_t)> run) {
  struct Shared {
    std::function<void(int64_t)> run;
    int64_t count;
    std::atomic<int64_t> next{0};
    std::mutex mutex;
    std::condition_variable all;
    int64_t done = 0;
    std::exception_ptr error;

    void Work() {
      for (int64_t i; (i = next++) < count;) {
        std::exception_ptr caught;
        try {
          const OneThread one;
          run(i);
        } catch (...) {
          caught = std::current_exception();
        }
        const std::lock_guard<std::mutex> lock(mutex);
        if (caught) error = caught;
        if (++done == count) all.notify_all();
      }
    }
  };
  const auto shared = std::make_shared<Shared>();
  shared->run = std::move(run);
  shared->count = count;
  for (int64_t i = 1; i < count; ++i) pool.Schedule([shared] { shared->Work(); });
  shared->Work();
  // What other threads have begun; none waits to begin.
  std::unique_lock<std::mutex> lock(shared->mutex);
  shared->all.wait(lock, [&] { return shared->done == count; });
  if (shared->error) std::rethrow_exception(shared->error);
}

inline int64_t Threads(const ffi::ThreadPool& pool) {
  return std::max<int64_t>(pool.num_threads(), 1);
}

// What was made for a key, now or before.
template <typename Plan>
const Plan& Kept(const std::vector<Numbers>& key, const std::function<Plan()>& make) {
  static std::mutex mutex;
  static auto& plans = *new std::map<std::vector<Numbers>, Plan>;
  const OneThread thread;
  const std::lock_guard<std::mutex> lock(mutex);
  auto found = plans.find(key);
  if (found == plans.end()) found = plans.emplace(key, make()).first;
  return found->second;
}

// Equal parts of a length, and a smaller last one.
struct Division {
  int64_t length, some, count;

  Division(int64_t length, int64_t parts, int64_t whole = 1) : length(length) {
    some = std::min(length, ((length + parts - 1) / parts + whole - 1) / whole * whole);
    count = (length + some - 1) / some;
  }
  int64_t last() const { return length - (count - 1) * some; }
};

inline memory::data_type TypeOf(const ffi::AnyBuffer& x) {
  return x.element_type() == ffi::DataType::BF16 ? memory::data_type::bf16
                                                 : memory::data_type::f32;
}

// What lies in a buffer behind some numbers.
inline memory At(const memory::desc& desc, const ffi::AnyBuffer& x, int64_t begin) {
  const size_t behind = begin * memory::data_type_size(TypeOf(x));
  return memory(desc, Cpu(), static_cast<char*>(x.untyped_data()) + behind);
}

inline void Reorder(memory from, memory to) {
  const OneThread thread;
  dnnl::stream stream(Cpu());
  dnnl::reorder(from, to).execute(stream, from, to);
  stream.wait();
}

// Adds parts of a sum to the first one, always in their order.
inline void Add(ffi::ThreadPool& pool, const std::vector<memory>& parts) {
  std::vector<float*> all;
  for (const memory& part : parts) {
    all.push_back(static_cast<float*>(part.get_data_handle()));
  }
  const Division size(parts[0].get_desc().get_size() / sizeof(float), Threads(pool));
  Share(pool, size.count, [&](int64_t i) {
    const int64_t end = std::min(size.length, (i + 1) * size.some);
    for (size_t part = 1; part < all.size(); ++part) {
      for (int64_t j = i * size.some; j < end; ++j) all[0][j] += all[part][j];
    }
  });
}

}  // namespace resnet_jax
