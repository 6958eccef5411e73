// The graph's head in JavaScript: onnxruntime-web refuses to override an input that has an initialiser. As runners/head.py; docs/runtimes.md shows it.
// `embedding`: Float32Array (D); `t`: novelty_threshold and the six tensors of a codebook, as Float32Arrays.

// `patchScore`: of a model with a bank; it joins the raw score, and no codebook changes it.

export function head(embedding, t, l2, patchScore = 0) {
  const D = embedding.length, K = t.cluster_radius.length;
  const norm = l2 ? Math.max(Math.hypot(...embedding), 1e-12) : 1;
  const apart = (rows, k, scale) => {
    let sum = 0;
    for (let d = 0; d < D; d++) sum += (embedding[d] / scale - rows[k * D + d]) ** 2;
    return Math.sqrt(sum);
  };
  const distances = Float32Array.from({ length: K }, (_, k) => apart(t.centroids, k, norm));
  const id = distances.indexOf(distances.reduce((a, b) => Math.min(a, b)));
  const s = Math.max(apart(t.cluster_mean, id, 1) / t.cluster_radius[id], patchScore);
  let above = 0, all = 0;
  t.calibration.forEach((c, m) => { all += t.calibration_weight[m]; if (c >= s) above += t.calibration_weight[m]; });
  const score = s / t.novelty_scale[0];
  return {
    cluster_id: id, distance: distances[id], novelty_score: score, p_value: (1 + above) / (1 + all),
    is_novel: score > t.novelty_threshold[0], distances, embedding,
  };
}
