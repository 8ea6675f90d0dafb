// A CUDA device that is not there: its memory is the host's, its kernels are torch's for the CPU.
//
// For a torch without CUDA. Tensors on it are CUDA tensors to torch and to Python: they may not meet tensors of the
// host, their backward runs in autograd's device thread, copies to them are transfers. What it tells that no CPU can:
//   kernels  operations that would each be launched, by name
//   waits    how often the host would wait for the device: a value read, a stream or an event synchronised, a copy that
//            is not between pinned memory and the device or not said to be non_blocking
// A copy to pinned memory arrives when somebody synchronises, and reads as NaN (all bits set) until then.
// It knows one stream and no concurrency: races between streams are beyond it, and so are the kernels themselves.

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_cpu_dispatch.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <array>
#include <set>
#include <string>

#include "memory.h"

namespace {

// --- kernels ------------------------------------------------------------------------------------

const std::set<std::string> READS = {"aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::masked_select",
                                     "aten::unique_dim", "aten::_unique2", "aten::unique_consecutive", "aten::bincount"};
const std::set<std::string> MIXES = {"aten::index", "aten::_index_put_impl_", "aten::index_put_"};

// Any operation of torch that has no kernel below: the CPU's, on the same memory.
void run(const c10::OperatorHandle& op, DispatchKeySet, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const auto& name = schema.name();
  for (const auto& result : schema.returns())
    TORCH_CHECK(!result.alias_info() || result.alias_info()->isWrite(), "the simulated device has no ", name);
  std::vector<std::pair<Tensor, Tensor>> seen;  // (a tensor of the device, its memory on the host)
  bool of_the_host = false;
  auto take = [&](const Tensor& t) -> Tensor {
    if (!t.defined()) return t;
    if (!t.is_cuda()) {
      of_the_host |= t.dim() > 0;
      return t;
    }
    seen.emplace_back(t, on_host(t));
    return seen.back().second;
  };
  for (auto it = stack->end() - static_cast<int64_t>(schema.arguments().size()); it != stack->end(); ++it) {
    if (it->isTensor()) {
      *it = take(it->toTensor());
    } else if (it->isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& t : it->toTensorVector()) list.push_back(take(t));
      *it = IValue(list);
    } else if (it->isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> list;
      for (const auto& t : it->toOptionalTensorVector()) list.push_back(t ? std::optional<Tensor>(take(*t)) : t);
      *it = IValue(list);
    } else if (it->isDevice()) {
      *it = IValue(Device(DeviceType::CPU));
    }
  }
  bool mixed = of_the_host && !seen.empty() && !MIXES.count(name);
  TORCH_CHECK(!mixed, "Expected all tensors to be on the same device: ", name);
  launched(name);
  if (READS.count(name)) wait();
  {
    at::AutoDispatchBelowADInplaceOrView below;
    op.redispatchBoxed(DispatchKeySet(DispatchKey::CPU), stack);
  }
  auto give = [&](const Tensor& t) -> Tensor {
    for (auto& [mine, host] : seen) {
      if (!t.defined() || host.unsafeGetTensorImpl() != t.unsafeGetTensorImpl()) continue;
      if (host.sizes() != mine.sizes()) {
        mine.resize_(host.sizes()).copy_(on_device(host));
      }
      return mine;
    }
    return on_device(t);
  };
  for (auto it = stack->end() - static_cast<int64_t>(schema.returns().size()); it != stack->end(); ++it) {
    if (it->isTensor()) {
      *it = give(it->toTensor());
    } else if (it->isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& t : it->toTensorVector()) list.push_back(give(t));
      *it = IValue(list);
    }
  }
}

Tensor empty(IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>, std::optional<Device>,
             std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(size, &device_memory, DispatchKeySet(DispatchKey::CUDA), at::dtype_or_default(dtype),
                                   format);
}

Tensor empty_strided(IntArrayRef size, IntArrayRef stride, std::optional<at::ScalarType> dtype,
                     std::optional<at::Layout>, std::optional<Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &device_memory, DispatchKeySet(DispatchKey::CUDA),
                                           at::dtype_or_default(dtype));
}

const Tensor& resize_(const Tensor& self, IntArrayRef size, std::optional<at::MemoryFormat>) {
  at::native::resize_impl_cpu_(self.unsafeGetTensorImpl(), size, std::nullopt);
  return self;
}

Tensor& set_(Tensor& self, at::Storage source, int64_t offset, IntArrayRef size, IntArrayRef stride) {
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(source));
  self.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride, offset);
  return self;
}

Tensor& set_whole(Tensor& self, at::Storage source) {
  return set_(self, source, 0, {static_cast<int64_t>(source.nbytes() / self.dtype().itemsize())}, {1});
}

Tensor attention(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& mask, double dropout,
                 bool causal, std::optional<double> scale, bool grouped) {
  auto all = [&](const Tensor& t) { return grouped ? t.repeat_interleave(q.size(1) / t.size(1), 1) : t; };
  return std::get<0>(at::_scaled_dot_product_flash_attention_for_cpu(q, all(k), all(v), dropout, causal, mask, scale));
}

Tensor& softmax_out(const Tensor& x, int64_t dim, bool half_to_float, Tensor& out) {
  launched("aten::_softmax");
  TORCH_CHECK(!half_to_float || x.scalar_type() == at::kHalf, "conversion is supported for Half type only");
  Tensor values = at::_softmax(half_to_float ? on_host(x).to(at::kFloat) : on_host(x), dim, false);
  on_host(out).copy_(values);
  return out;
}

Tensor softmax(const Tensor& x, int64_t dim, bool half_to_float) {
  Tensor out = at::empty(x.sizes(), x.options().dtype(half_to_float ? at::kFloat : x.scalar_type()));
  return softmax_out(x, dim, half_to_float, out);
}

std::tuple<Tensor, Tensor> rms_norm(const Tensor& x, IntArrayRef, const std::optional<Tensor>& weight,
                                    std::optional<double> eps) {
  launched("rms_norm");
  Tensor wide = on_host(x).to(x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
  Tensor rstd = (wide.square().mean(-1, true) + *eps).rsqrt();
  return {on_device((wide * rstd * on_host(*weight)).to(x.scalar_type())), on_device(rstd)};
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grad, const Tensor& x, IntArrayRef shape, const Tensor& rstd,
                                             const std::optional<Tensor>& weight, std::array<bool, 2> wanted) {
  launched("rms_norm_backward");
  TORCH_CHECK(grad.is_contiguous() && x.is_contiguous() && weight && weight->scalar_type() == x.scalar_type());
  auto wide = rstd.scalar_type();
  Tensor g = on_host(grad).to(wide), r = on_host(rstd), normal = on_host(x).to(wide) * r;
  Tensor scaled = g * on_host(*weight).to(wide);
  Tensor dx = (scaled - normal * (scaled * normal).mean(-1, true)) * r;
  Tensor dw = (g * normal).reshape({-1, shape[0]}).sum(0);
  return {on_device(dx.to(x.scalar_type())), wanted[1] ? on_device(dw.to(x.scalar_type())) : Tensor()};
}

// --- what torch asks a device -------------------------------------------------------------------

struct Guard final : c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override { return DeviceType::CUDA; }
  Device exchangeDevice(Device) const override { return HERE; }
  Device getDevice() const override { return HERE; }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  c10::Stream getStream(Device) const noexcept override { return stream(); }
  c10::Stream getDefaultStream(Device) const override { return stream(); }
  c10::Stream getNewStream(Device, int) const override { return stream(); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return stream(); }
  DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void** event, const c10::Stream&, DeviceIndex, c10::EventFlag) const override { *event = &waits; }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override { wait(); }
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
  static c10::Stream stream() { return c10::Stream(c10::Stream::DEFAULT, HERE); }
};

}  // namespace

namespace at {

struct CUDAHooks final : CUDAHooksInterface {  // torch looks it up by this name
  explicit CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex current_device() const override { return 0; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  int getNumGPUs() const override { return 1; }
  const Generator& getDefaultGenerator(c10::DeviceIndex) const override { return detail::getDefaultCPUGenerator(); }
  Generator getNewGenerator(c10::DeviceIndex) const override { return detail::createCPUGenerator(); }
  bool isPinnedPtr(const void* data) const override { return is_pinned(data); }
  Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory; }
  Device getDeviceFromPtr(void*) const override { return HERE; }
  void deviceSynchronize(c10::DeviceIndex) const override { wait(); }
};
REGISTER_CUDA_HOOKS(CUDAHooks);

}  // namespace at

C10_REGISTER_GUARD_IMPL(CUDA, Guard);
namespace c10 {
REGISTER_ALLOCATOR(DeviceType::CUDA, &device_memory);
}

TORCH_LIBRARY(simulated, m) {
  m.def("on_host", &on_host);
  m.def("resize_storage(Tensor tensor, int size) -> ()", [](const Tensor& t, int64_t size) {
    at::native::resize_bytes_cpu(t.storage().unsafeGetStorageImpl(), static_cast<size_t>(size));
  });
}

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&run>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("copy_", &copy_);
  m.impl("resize_", &resize_);
  m.impl("set_.source_Storage_storage_offset", &set_);
  m.impl("set_.source_Storage", &set_whole);
  m.impl("as_strided", [](const Tensor& t, IntArrayRef size, IntArrayRef stride, std::optional<int64_t> offset) {
    return at::cpu::as_strided(t, size, stride, offset);
  });
  m.impl("view", &at::native::view);
  m.impl("_reshape_alias", &at::native::_reshape_alias);
  m.impl("unfold", &at::native::unfold);
  m.impl("_softmax", &softmax);
  m.impl("_softmax.out", &softmax_out);
  m.impl("_fused_rms_norm", &rms_norm);
  m.impl("_fused_rms_norm_backward", &rms_norm_backward);
  // Kernels of CUDA's that torch would put together from others where it finds none.
  for (const char* name : {"native_layer_norm", "silu_backward"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&run>());
  for (const auto& op : c10::Dispatcher::singleton().getAllOpNames())
    if (op.name.rfind("aten::_foreach_", 0) == 0)
      m.impl(c10::toString(op).substr(6).c_str(), torch::CppFunction::makeFromBoxedFunction<&run>());
}

TORCH_LIBRARY_IMPL(aten, AutogradCUDA, m) { m.impl("scaled_dot_product_attention", &attention); }

extern "C" {
int64_t simulated_held() { return held; }
void simulated_forget_peak() { peak = held.load(); }
int64_t simulated_peak() { return peak; }
int64_t simulated_waits() { return waits; }
void simulated_synchronize() { wait(); }
// "name count" lines; returns how many bytes they are, of which at most `size` are written.
int64_t simulated_kernels(char* out, int64_t size) {
  std::lock_guard<std::mutex> guard(lock);
  std::string text;
  for (const auto& [name, count] : kernels) text += name + "\t" + std::to_string(count) + "\n";
  std::strncpy(out, text.c_str(), static_cast<size_t>(size));
  return static_cast<int64_t>(text.size());
}
}
