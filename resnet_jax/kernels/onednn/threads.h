// Sharing of work among XLA's threads.

#pragma once

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>

#include "xla/ffi/api/ffi.h"

namespace resnet_jax {

namespace ffi = xla::ffi;

// Limits OpenMP to one thread in a scope, since XLA's threads share the work already.
class OneThread {
 public:
  OneThread() { omp_set_num_threads(1); }
  ~OneThread() { omp_set_num_threads(before_); }

 private:
  const int before_ = omp_get_max_threads();
};

// Returns the number of XLA's threads.
inline int64_t Threads(const ffi::ThreadPool& pool) {
  return std::max<int64_t>(pool.num_threads(), 1);
}

// How often a thread checks whether the others are done before it sleeps: 0.06 ms.
constexpr int64_t kSpins = 5000;

// Calls `run` for all numbers below `count`, on this thread and on XLA's.
inline void Share(ffi::ThreadPool& pool, int64_t count,
                  std::function<void(int64_t)> run) {
  struct Shared {
    std::function<void(int64_t)> run;
    int64_t count;
    std::atomic<int64_t> next{0};
    std::mutex mutex;
    std::condition_variable all;
    std::atomic<int64_t> done{0};
    std::exception_ptr error;

    void Work() {
      for (int64_t i; (i = next++) < count;) {
        std::exception_ptr caught;
        try {
          const OneThread thread;
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
  for (int64_t i = 1; i < std::min(count, Threads(pool)); ++i) {
    pool.Schedule([shared] { shared->Work(); });
  }
  shared->Work();
  // Now all numbers are taken, and this thread waits for those that others have begun.
  // Mostly they are done sooner than a sleeping thread could be woken.
  for (int64_t i = 0; i < kSpins && shared->done < count; ++i) __builtin_ia32_pause();
  std::unique_lock<std::mutex> lock(shared->mutex);
  shared->all.wait(lock, [&] { return shared->done == count; });
  if (shared->error) std::rethrow_exception(shared->error);
}

// The division of a length into `count` parts of `some`, the last of which may be
// smaller. All but the last are multiples of `whole`.
struct Division {
  int64_t length, some, count;

  Division(int64_t length, int64_t parts, int64_t whole = 1) : length(length) {
    some = std::min(length, ((length + parts - 1) / parts + whole - 1) / whole * whole);
    count = (length + some - 1) / some;
  }
  int64_t last() const { return length - (count - 1) * some; }
};

}  // namespace resnet_jax
