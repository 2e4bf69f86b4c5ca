{{- /* Of a Job, whether JobSet's or its own. */}}
{{- define "ic.job" -}}
completionMode: Indexed
completions: {{ .Values.nodes }}
parallelism: {{ .Values.nodes }}
{{- with .Values.deadlineSeconds }}
activeDeadlineSeconds: {{ . }}
{{- end }}
# docs/exit-codes.md: 2 bad input; 75 and 143 stopped with a checkpoint; all else a failure.
podFailurePolicy:
  rules:
    - action: FailJob
      onExitCodes: {containerName: train, operator: In, values: [2]}
    - action: {{ eq .Values.kind "JobSet" | ternary "FailJob" "Ignore" }}
      onExitCodes: {containerName: train, operator: In, values: [75, 143]}
    - action: {{ eq .Values.kind "JobSet" | ternary "FailJob" "Ignore" }}
      onPodConditions: [{type: DisruptionTarget, status: "True"}]
{{- end }}

{{- define "ic.pod" -}}
metadata:
  labels:
    {{- include "ic.labels" . | nindent 4 }}
spec:
  restartPolicy: Never
  subdomain: {{ include "ic.name" . }}
  serviceAccountName: {{ include "ic.name" . }}
  automountServiceAccountToken: false
  enableServiceLinks: false
  terminationGracePeriodSeconds: {{ .Values.graceSeconds }}
  securityContext:
    runAsNonRoot: true
    runAsUser: 10001
    runAsGroup: 10001
    fsGroup: 10001
    fsGroupChangePolicy: OnRootMismatch
    seccompProfile: {type: RuntimeDefault}
  {{- with .Values.image.pullSecrets }}
  imagePullSecrets:
    {{- range . }}
    - name: {{ . }}
    {{- end }}
  {{- end }}
  {{- with .Values.runtimeClass }}
  runtimeClassName: {{ . }}
  {{- end }}
  {{- with .Values.nodeSelector }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .Values.affinity }}
  affinity:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- if or .Values.gpusPerNode .Values.tolerations }}
  tolerations:
    {{- if .Values.gpusPerNode }}
    - {key: {{ .Values.gpuResource }}, operator: Exists, effect: NoSchedule}
    {{- end }}
    {{- with .Values.tolerations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  {{- end }}
  containers:
    - name: train
      image: {{ include "ic.image" . }}
      imagePullPolicy: {{ .Values.image.pullPolicy }}
      # One process for each pod; it starts one for each further GPU. Not torchrun, which would end
      # with 1 whatever our exit code says.
      command: [python, -m, ic, fit]
      args:
        {{- toYaml .Values.overrides | nindent 8 }}
        - output_dir=/runs
        - run_id={{ .Values.runId | default .Release.Name }}
        - ckpt_path=auto
        - trainer.num_nodes={{ .Values.nodes }}
        - trainer.devices={{ .Values.gpusPerNode | default 1 }}
        - trainer.accelerator={{ eq (int .Values.gpusPerNode) 0 | ternary "cpu" "gpu" }}
        {{- if .Values.monitoring.podMonitor.enabled }}
        - "callbacks.prometheus={host: '0.0.0.0', port: {{ .Values.monitoring.podMonitor.port }}}"
        {{- end }}
      env:
        - {name: MASTER_ADDR, value: {{ include "ic.master" . }}}
        - {name: MASTER_PORT, value: "29500"}
        - name: NODE_RANK
          valueFrom:
            fieldRef: {fieldPath: "metadata.annotations['batch.kubernetes.io/job-completion-index']"}
        - {name: HOME, value: /tmp}
        - {name: XDG_CACHE_HOME, value: /tmp/cache}
        - {name: TRITON_CACHE_DIR, value: /tmp/triton}
        - {name: TORCHINDUCTOR_CACHE_DIR, value: /tmp/inductor}
        {{- range $key, $value := .Values.environment }}
        - {name: {{ $key }}, value: {{ $value | quote }}}
        {{- end }}
      {{- with .Values.environmentFrom }}
      envFrom:
        {{- range . }}
        - secretRef: {name: {{ . }}}
        {{- end }}
      {{- end }}
      ports:
        - {name: rendezvous, containerPort: 29500}
        {{- if .Values.monitoring.podMonitor.enabled }}
        {{- range $rank := until (.Values.gpusPerNode | default 1 | int) }}
        - {name: metrics-{{ $rank }}, containerPort: {{ add $.Values.monitoring.podMonitor.port $rank }}}
        {{- end }}
        {{- end }}
      securityContext:
        allowPrivilegeEscalation: false
        readOnlyRootFilesystem: true
        capabilities: {drop: [ALL]}
      resources:
        {{- $resources := deepCopy .Values.resources }}
        {{- if .Values.gpusPerNode }}
        {{- $gpus := dict .Values.gpuResource (.Values.gpusPerNode | toString) }}
        {{- $resources = mergeOverwrite $resources (dict "requests" $gpus "limits" $gpus) }}
        {{- end }}
        {{- toYaml $resources | nindent 8 }}
      volumeMounts:
        - {name: runs, mountPath: /runs}
        {{- if .Values.volumes.data.claim }}
        - {name: data, mountPath: /data, readOnly: true}
        {{- end }}
        - {name: scratch, mountPath: /tmp}
        - {name: shared-memory, mountPath: /dev/shm}
  volumes:
    - name: runs
      persistentVolumeClaim: {claimName: {{ .Values.volumes.runs.claim }}}
    {{- with .Values.volumes.data.claim }}
    - name: data
      persistentVolumeClaim: {claimName: {{ . }}, readOnly: true}
    {{- end }}
    - name: scratch
      emptyDir: {sizeLimit: {{ .Values.scratch }}}
    - name: shared-memory
      emptyDir: {medium: Memory, sizeLimit: {{ .Values.sharedMemory }}}
{{- end }}
