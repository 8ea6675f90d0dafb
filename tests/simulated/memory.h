// The memory of the simulated device (device.cpp), what it counts, and transfers to and from the host.

#pragma once

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <c10/core/impl/alloc_cpu.h>

#include <atomic>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <vector>

namespace {

using at::IntArrayRef;
using at::Tensor;
using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;
using c10::DispatchKey;
using c10::DispatchKeySet;
using c10::IValue;

const Device HERE(DeviceType::CUDA, 0);

// --- what is told -----------------------------------------------------------------------------

std::mutex lock;
std::map<std::string, int64_t> kernels;
std::atomic<int64_t> held{0}, peak{0}, waits{0};

void launched(const std::string& name) {
  std::lock_guard<std::mutex> guard(lock);
  ++kernels[name];
}

// --- memory -----------------------------------------------------------------------------------

struct Block { void* data; int64_t size; };

void give_back(void* context) {
  auto* block = static_cast<Block*>(context);
  held -= block->size;
  c10::free_cpu(block->data);
  delete block;
}

struct DeviceMemory final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    void* data = c10::alloc_cpu(size);
    int64_t now = held += static_cast<int64_t>(size), before = peak;
    while (now > before && !peak.compare_exchange_weak(before, now)) {
    }
    return {data, new Block{data, static_cast<int64_t>(size)}, &give_back, HERE};
  }
  void copy_data(void* to, const void* from, size_t size) const override { default_copy_data(to, from, size); }
};
DeviceMemory device_memory;

std::map<const char*, size_t> pinned;  // begin -> size; guarded by lock

struct PinnedMemory final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    void* data = c10::alloc_cpu(size);
    if (data != nullptr) {
      std::lock_guard<std::mutex> guard(lock);
      pinned[static_cast<char*>(data)] = size;
    }
    return {data, data, &release, Device(DeviceType::CPU)};
  }
  static void release(void* data) {
    {
      std::lock_guard<std::mutex> guard(lock);
      pinned.erase(static_cast<char*>(data));
    }
    c10::free_cpu(data);
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t size) const override { default_copy_data(to, from, size); }
};
PinnedMemory pinned_memory;

bool is_pinned(const void* data) {
  std::lock_guard<std::mutex> guard(lock);
  auto after = pinned.upper_bound(static_cast<const char*>(data));
  if (after == pinned.begin()) return false;
  --after;
  return static_cast<const char*>(data) < after->first + after->second;
}

// --- the same memory, seen from either side -----------------------------------------------------

Tensor alias(const Tensor& t, const c10::Storage& storage, DispatchKey key) {
  auto out = at::detail::make_tensor<c10::TensorImpl>(c10::Storage(storage), DispatchKeySet(key), t.dtype());
  out.unsafeGetTensorImpl()->set_sizes_and_strides(t.sizes(), t.strides(), t.storage_offset());
  return out;
}

Tensor on_host(const Tensor& t) {
  if (!t.defined() || !t.is_cuda()) return t;
  if (t.storage().nbytes() == 0) return at::detail::empty_strided_cpu(t.sizes(), t.strides(), t.scalar_type());
  c10::DataPtr data(t.storage().mutable_data(), Device(DeviceType::CPU));
  c10::Storage storage(c10::Storage::use_byte_size_t(), t.storage().nbytes(), std::move(data), nullptr, false);
  return alias(t, storage, DispatchKey::CPU);
}

Tensor on_device(const Tensor& t) {  // a copy: a kernel's result
  if (!t.defined()) return t;
  auto size = t.storage().nbytes();
  c10::Storage storage(c10::Storage::use_byte_size_t(), size, device_memory.allocate(size), &device_memory, true);
  if (size) std::memcpy(storage.mutable_data(), t.storage().data(), size);
  return alias(t, storage, DispatchKey::CUDA);
}

// --- transfers ----------------------------------------------------------------------------------

std::vector<std::pair<Tensor, Tensor>> under_way;  // (pinned memory, what will be there)

void synchronize() {
  std::vector<std::pair<Tensor, Tensor>> arrived;
  {
    std::lock_guard<std::mutex> guard(lock);
    arrived.swap(under_way);
  }
  for (auto& [to, values] : arrived) to.copy_(values);
}

void wait() {
  ++waits;
  synchronize();
}

Tensor& copy_(Tensor& self, const Tensor& source, bool non_blocking) {
  Tensor to = on_host(self), from = on_host(source);
  if (self.is_cuda() && source.is_cuda()) {
    launched("aten::copy_");
    to.copy_(from);
    return self;
  }
  const void* host = self.is_cuda() ? source.const_data_ptr() : self.const_data_ptr();
  bool free = non_blocking && (self.numel() == 0 || is_pinned(host));
  launched(self.is_cuda() ? "to the device" : "to the host");
  if (!free) ++waits;
  if (!free || self.is_cuda()) synchronize();
  if (free && !self.is_cuda()) {
    Tensor values = at::empty_like(to).copy_(from);
    if (to.is_contiguous()) std::memset(to.mutable_data_ptr(), 0xFF, to.nbytes());
    std::lock_guard<std::mutex> guard(lock);
    under_way.emplace_back(to, values);
  } else {
    to.copy_(from);
  }
  return self;
}

}  // namespace
