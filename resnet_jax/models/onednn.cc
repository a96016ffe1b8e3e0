// Convolutions by oneDNN as custom calls of XLA on CPUs; onednn.py builds and calls it.

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

namespace {

namespace ffi = xla::ffi;
using dnnl::memory;
using Numbers = std::vector<int64_t>;

enum Direction : int64_t { kForward, kInput, kKernel };

const dnnl::engine& Cpu() {
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

// A convolution of some images, compiled.
struct Part {
  dnnl::primitive run;
  memory::desc image, output, scratch;
};

// A direction of a convolution: images in equal parts, and a smaller last one.
struct Plan {
  memory::desc given, kernel;  // The kernel as XLA has it, and as oneDNN wants it.
  Part part, last;
  int64_t images;
};

Part Compile(Direction direction, int64_t images, memory::dims image,
             memory::dims output, const memory::desc& kernel, memory::data_type type,
             const Numbers& where, memory::desc* wanted) {
  image[0] = output[0] = images;
  const memory::dims stride{where[0], where[0]}, dilation{where[1] - 1, where[1] - 1};
  const memory::dims before{where[2], where[4]}, behind{where[3], where[5]};
  const memory::desc x(image, type, memory::format_tag::nhwc);
  const memory::desc y(output, type, memory::format_tag::nhwc);
  dnnl::primitive_attr attr;
  attr.set_scratchpad_mode(dnnl::scratchpad_mode::user);
  const auto direct = dnnl::algorithm::convolution_direct;
  const auto kind = direction == kForward ? dnnl::prop_kind::forward_inference
                                          : dnnl::prop_kind::forward_training;
  if (direction == kForward) {
    const dnnl::convolution_forward::primitive_desc made(
        Cpu(), kind, direct, x, kernel, y, stride, dilation, before, behind, attr);
    *wanted = made.weights_desc();
    return {dnnl::convolution_forward(made), x, y, made.scratchpad_desc()};
  }
  const memory::desc any(kernel.get_dims(), type, memory::format_tag::any);
  const dnnl::convolution_forward::primitive_desc forward(
      Cpu(), kind, direct, x, any, y, stride, dilation, before, behind);
  if (direction == kInput) {
    const dnnl::convolution_backward_data::primitive_desc made(
        Cpu(), direct, x, kernel, y, stride, dilation, before, behind, forward, attr);
    *wanted = made.weights_desc();
    return {dnnl::convolution_backward_data(made), x, y, made.scratchpad_desc()};
  }
  const dnnl::convolution_backward_weights::primitive_desc made(
      Cpu(), direct, x, kernel, y, stride, dilation, before, behind, forward, attr);
  *wanted = made.diff_weights_desc();
  return {dnnl::convolution_backward_weights(made), x, y, made.scratchpad_desc()};
}

Plan Make(Direction direction, int64_t parts, const memory::dims& image,
          const memory::dims& output, const memory::dims& kernel,
          memory::data_type type, const Numbers& where) {
  Plan plan;
  plan.given = memory::desc(kernel, type, memory::format_tag::hwio);
  // Sums over images are of float32.
  const auto sums = direction == kKernel ? memory::data_type::f32 : type;
  const memory::desc any(kernel, sums, memory::format_tag::any);
  plan.images = (image[0] + parts - 1) / parts;
  plan.part = Compile(direction, plan.images, image, output, any, type, where,
                      &plan.kernel);
  const int64_t last = image[0] - (image[0] - 1) / plan.images * plan.images;
  plan.last = Compile(direction, last, image, output, plan.kernel, type, where,
                      &plan.kernel);
  return plan;
}

// Calls `run` for all numbers below `count`, also on XLA's threads.
void Share(ffi::ThreadPool& pool, int64_t count, std::function<void(int64_t)> run) {
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

memory::dims Image(const ffi::AnyBuffer& x) {
  const auto d = x.dimensions();
  return {d[0], d[3], d[1], d[2]};
}

memory::dims Kernel(const ffi::AnyBuffer& x) {
  const auto d = x.dimensions();
  return {d[3], d[2], d[0], d[1]};
}

void Reorder(memory from, memory to) {
  const OneThread thread;
  dnnl::stream stream(Cpu());
  dnnl::reorder(from, to).execute(stream, from, to);
  stream.wait();
}

const Plan& PlanOf(Direction direction, int64_t parts, const memory::dims& image,
                   const memory::dims& output, const memory::dims& kernel,
                   memory::data_type type, const Numbers& where) {
  static std::mutex mutex;
  static auto& plans = *new std::map<std::vector<Numbers>, Plan>;
  const std::vector<Numbers> key{
      {direction, parts, static_cast<int64_t>(type)}, where, image, kernel, output};
  const OneThread thread;
  const std::lock_guard<std::mutex> lock(mutex);
  auto found = plans.find(key);
  if (found == plans.end()) {
    Plan made = Make(direction, parts, image, output, kernel, type, where);
    found = plans.emplace(key, std::move(made)).first;
  }
  return found->second;
}

void Run(ffi::ThreadPool& pool, Direction direction, const Numbers& where,
         const ffi::AnyBuffer& one, const ffi::AnyBuffer& other,
         const ffi::AnyBuffer& out) {
  const bool forward = direction == kForward, gradient = direction == kKernel;
  const ffi::AnyBuffer& x = direction == kInput ? out : one;
  const ffi::AnyBuffer& k = gradient ? out : other;
  const ffi::AnyBuffer& y = forward ? out : direction == kInput ? one : other;
  const auto type = one.element_type() == ffi::DataType::BF16 ? memory::data_type::bf16
                                                              : memory::data_type::f32;
  const memory::dims image = Image(x);
  const int64_t threads = std::max<int64_t>(pool.num_threads(), 1);
  const Plan& plan = PlanOf(direction, std::min<int64_t>(threads, image[0]), image,
                            Image(y), Kernel(k), type, where);
  const int64_t count = (image[0] + plan.images - 1) / plan.images;

  const memory given(plan.given, Cpu(), k.untyped_data());
  const bool as_given = plan.kernel == plan.given;
  std::vector<memory> kernels;
  for (int64_t i = 0; i < (gradient ? count : 1); ++i) {
    kernels.push_back(as_given && i == 0 ? given : memory(plan.kernel, Cpu()));
  }
  if (!gradient && !as_given) Reorder(given, kernels[0]);

  auto* const images = static_cast<char*>(x.untyped_data());
  auto* const outputs = static_cast<char*>(y.untyped_data());
  Share(pool, count, [&](int64_t i) {
    const Part& part = i + 1 == count ? plan.last : plan.part;
    const size_t behind_x = i * plan.part.image.get_size();
    const size_t behind_y = i * plan.part.output.get_size();
    dnnl::stream stream(Cpu());
    part.run.execute(
        stream,
        {{direction == kInput ? DNNL_ARG_DIFF_SRC : DNNL_ARG_SRC,
          memory(part.image, Cpu(), images + behind_x)},
         {gradient ? DNNL_ARG_DIFF_WEIGHTS : DNNL_ARG_WEIGHTS,
          kernels[gradient ? i : 0]},
         {forward ? DNNL_ARG_DST : DNNL_ARG_DIFF_DST,
          memory(part.output, Cpu(), outputs + behind_y)},
         {DNNL_ARG_SCRATCHPAD, memory(part.scratch, Cpu())}});
    stream.wait();
  });
  if (!gradient) return;
  auto* const sums = static_cast<float*>(kernels[0].get_data_handle());
  const size_t size = plan.kernel.get_size() / sizeof(float);
  for (int64_t i = 1; i < count; ++i) {
    const auto* const more = static_cast<const float*>(kernels[i].get_data_handle());
    for (size_t j = 0; j < size; ++j) sums[j] += more[j];
  }
  if (!as_given) Reorder(kernels[0], given);
}

ffi::Error Convolve(ffi::ThreadPool pool, int64_t direction,
                    ffi::Span<const int64_t> where, ffi::AnyBuffer one,
                    ffi::AnyBuffer other, ffi::Result<ffi::AnyBuffer> out) {
  try {
    Run(pool, static_cast<Direction>(direction), Numbers(where.begin(), where.end()),
        one, other, *out);
  } catch (const std::exception& error) {
    return ffi::Error(ffi::ErrorCode::kInternal, error.what());
  }
  return ffi::Error::Success();
}

}  // namespace

// Whether the CPU has instructions for products of bfloat16.
extern "C" int ResnetJaxHasBfloat16() {
  const auto isa = static_cast<int>(dnnl::get_effective_cpu_isa());
  const auto least = static_cast<int>(dnnl::cpu_isa::avx512_core_bf16);
  return (isa & least) == least;
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(ResnetJaxConvolve, Convolve,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<int64_t>("direction")
                                  .Attr<ffi::Span<const int64_t>>("where")
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>());
