// Every op's schema, in one place: what Python, C++ and exported programs see of attnrec.
//
// Written against LibTorch's stable ABI, so that one binary serves every torch from 2.11 on. The kernels of a
// device are registered by that device's bindings (csrc/cpu, csrc/cuda); fakes and autograd by attnrec/ops.
// Shapes and meanings are those of attnrec/reference.py. An absent optional gradient is an empty tensor.

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(attnrec, m) {
  m.def(
      "target_attention(Tensor query, Tensor key, Tensor value, Tensor q_offsets, Tensor kv_offsets, *, "
      "float? scale=None, Tensor? kv_lengths=None, Tensor? visible=None, Tensor? self_key=None, "
      "Tensor? self_value=None, Tensor? key_bias=None, SymInt? max_kv_length=None) "
      "-> (Tensor out, Tensor lse)");
  m.def(
      "target_attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, "
      "Tensor out, Tensor lse, Tensor q_offsets, Tensor kv_offsets, *, float? scale=None, "
      "Tensor? kv_lengths=None, Tensor? visible=None, Tensor? self_key=None, Tensor? self_value=None, "
      "Tensor? key_bias=None) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value, "
      "Tensor grad_self_key, Tensor grad_self_value, Tensor grad_key_bias)");
  m.def(
      "target_attention_weights(Tensor query, Tensor key, Tensor q_offsets, Tensor kv_offsets, *, "
      "float? scale=None, Tensor? kv_lengths=None, Tensor? visible=None, Tensor? self_key=None, "
      "Tensor? key_bias=None) -> (Tensor weights, Tensor offsets)");
  m.def(
      "target_attention_top(Tensor query, Tensor key, Tensor q_offsets, Tensor kv_offsets, SymInt top, *, "
      "float? scale=None, Tensor? kv_lengths=None, Tensor? visible=None, Tensor? self_key=None, "
      "Tensor? key_bias=None) -> (Tensor weights, Tensor events)");
  m.def(
      "softmax_score(Tensor users, Tensor items, Tensor offsets, *, float temperature=1.0, "
      "Tensor? bias=None) -> Tensor");
  m.def(
      "softmax_score_backward(Tensor grad, Tensor users, Tensor items, Tensor offsets, "
      "Tensor probabilities, *, float temperature=1.0, Tensor? bias=None) "
      "-> (Tensor grad_users, Tensor grad_items, Tensor grad_bias)");
  m.def(
      "catalog_topk(Tensor users, Tensor catalog, SymInt k, *, Tensor? exclude_ids=None, "
      "Tensor? exclude_offsets=None, Tensor? bias=None, float temperature=1.0, Tensor? filter=None, "
      "Tensor? filter_scale=None, Tensor? filter_error=None) -> (Tensor scores, Tensor ids, Tensor lse)");
  m.def("catalog_filter(Tensor rows, str dtype) -> (Tensor codes, Tensor scale, Tensor error)");
  m.def(
      "catalog_cross_entropy(Tensor users, Tensor table, Tensor target, *, float temperature=1.0, "
      "Tensor? bias=None, Tensor? logq=None, float label_smoothing=0.0, int ignore_index=-100, "
      "Tensor? negatives=None, bool in_batch=False) -> (Tensor loss, Tensor lse)");
  m.def(
      "catalog_cross_entropy_backward(Tensor grad_loss, Tensor users, Tensor table, Tensor target, "
      "Tensor lse, *, float temperature=1.0, Tensor? bias=None, Tensor? logq=None, "
      "float label_smoothing=0.0, int ignore_index=-100, Tensor? negatives=None, bool in_batch=False, "
      "bool needs_users=True, bool needs_table=True) "
      "-> (Tensor grad_users, Tensor grad_table, Tensor grad_bias)");

  // Not an op of tensors: whether the CUDA kernels of this process may round fp32 operands to tf32, as
  // torch.set_float32_matmul_precision says, which the stable ABI cannot ask. Off until it is called.
  m.def("allow_tf32(bool allowed) -> ()");
}
