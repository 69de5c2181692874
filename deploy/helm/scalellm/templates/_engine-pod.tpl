{{/* One pod of a model: `component` is engine, or rank for the other hosts of a replica. */}}
{{- define "scalellm.enginePod" -}}
{{- $root := .root }}
{{- $model := .model }}
{{- $worker := eq .component "rank" }}
{{- $ranks := int ($model.tensorParallelSize | default 1) }}
{{- $hosts := int ($model.hosts | default 1) }}
{{- $shaped := include "scalellm.isShaped" $model }}
{{- $port := $root.Values.engine.port -}}
metadata:
  labels:
    {{- include "scalellm.labels" $root | nindent 4 }}
    app.kubernetes.io/component: {{ .component }}
    scalellm/model: {{ include "scalellm.modelId" $model }}
spec:
  serviceAccountName: {{ include "scalellm.name" $root }}
  automountServiceAccountToken: false
  enableServiceLinks: false
  terminationGracePeriodSeconds: {{ $root.Values.engine.drainTimeoutSeconds }}
  securityContext: {{- include "scalellm.podSecurity" $root | nindent 4 }}
  {{- with $root.Values.imagePullSecrets }}
  imagePullSecrets: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- include "scalellm.placement" $model | nindent 2 }}
  topologySpreadConstraints:
    - maxSkew: 1
      topologyKey: kubernetes.io/hostname
      whenUnsatisfiable: ScheduleAnyway
      labelSelector:
        matchLabels:
          {{- include "scalellm.selector" $root | nindent 10 }}
          scalellm/model: {{ include "scalellm.modelId" $model }}
  containers:
    - name: engine
      image: {{ include "scalellm.image" $root }}
      imagePullPolicy: {{ $root.Values.image.pullPolicy }}
      args:
        - {{ if $shaped }}serve{{ else }}engine{{ end }}
        - {{ $model.model | quote }}
        - --served-model-name={{ $model.name }}
        {{- if $shaped }}
        - --host=0.0.0.0
        - --port={{ $port }}
        - --blueprint={{ $model.blueprint | default "static" }}
        - --devices={{ required (printf "models: %s has shapes and no devices to divide" $model.name) $model.devices }}
        - --routing={{ $model.routing | default "prefix" }}
        - --start-timeout-s={{ $root.Values.engine.startupSeconds }}
        {{- range $model.shapes }}
        - --replica={{ . }}
        {{- end }}
        {{- else }}
        {{- if not $worker }}
        - --listen=0.0.0.0:{{ $port }}
        {{- end }}
        - --tensor-parallel-size={{ $ranks }}
        {{- if gt $hosts 1 }}
        - --nnodes={{ $hosts }}
        {{- if $worker }}
        - --node-rank=$(LWS_WORKER_INDEX)
        - --master-addr=$(LWS_LEADER_ADDRESS)
        {{- else }}
        - --master-addr=$(POD_IP)
        {{- end }}
        {{- end }}
        {{- end }}
        {{- with $model.revision }}
        - --revision={{ . }}
        {{- end }}
        {{- with $model.maxModelLen }}
        - --max-model-len={{ . }}
        {{- end }}
        {{- with $model.cpuThreads }}
        {{- $here := div $ranks $hosts }}
        {{- if lt (int .) (int $here) }}{{ fail (printf "models: %s has %d ranks and cpuThreads %d; each rank needs one" $model.name $here (int .)) }}{{ end }}
        {{- if and $shaped (lt (int .) (int $model.devices)) }}{{ fail (printf "models: %s has %d devices and cpuThreads %d; each device needs one" $model.name (int $model.devices) (int .)) }}{{ end }}
        - --cpu-threads={{ . }}
        {{- end }}
        {{- range $model.args }}
        - {{ . | quote }}
        {{- end }}
      env:
        {{- if gt $hosts 1 }}
        - {name: POD_IP, valueFrom: {fieldRef: {fieldPath: status.podIP}}}
        {{- end }}
        {{- include "scalellm.hubToken" $root | nindent 8 }}
        - {name: HOME, value: /cache}
        - {name: XDG_CACHE_HOME, value: /cache}
        - {name: HF_HOME, value: /cache/huggingface}
      {{- if not $worker }}
      ports:
        - {name: {{ include "scalellm.portName" $model }}, containerPort: {{ $port }}}
      {{- if $shaped }}
      # Its root heals what dies in the pod, its gateway too; /health tells of the gateway alone.
      {{- else }}
      # The service "loop" serves while the engine's loop comes round, and "" while it takes requests.
      {{- end }}
      startupProbe:
        {{- if $shaped }}
        httpGet: {path: /ready, port: http}
        {{- else }}
        grpc: {port: {{ $port }}, service: loop}
        {{- end }}
        periodSeconds: 2
        failureThreshold: {{ div $root.Values.engine.startupSeconds 2 | max 1 }}
      livenessProbe:
        {{- if $shaped }}
        httpGet: {path: /health, port: http}
        {{- else }}
        grpc: {port: {{ $port }}, service: loop}
        {{- end }}
        periodSeconds: 5
        timeoutSeconds: 3
        failureThreshold: {{ ternary 12 3 (ne $shaped "") }}
      readinessProbe:
        {{- if $shaped }}
        httpGet: {path: /ready, port: http}
        {{- else }}
        grpc: {port: {{ $port }}}
        {{- end }}
        periodSeconds: 2
        timeoutSeconds: 2
      {{- end }}
      {{- with $model.resources }}
      resources: {{- toYaml . | nindent 8 }}
      {{- end }}
      securityContext: {{- include "scalellm.containerSecurity" $root | nindent 8 }}
      volumeMounts:
        - {name: cache, mountPath: /cache}
        - {name: tmp, mountPath: /tmp}
        {{- if $root.Values.modelVolume.existingClaim }}
        - {name: models, mountPath: /models, readOnly: true}
        {{- end }}
  volumes:
    - name: cache
      {{- if $root.Values.cache.existingClaim }}
      persistentVolumeClaim: {claimName: {{ $root.Values.cache.existingClaim }}}
      {{- else }}
      emptyDir: {sizeLimit: {{ $root.Values.cache.sizeLimit }}}
      {{- end }}
    - name: tmp
      emptyDir: {}
    {{- with $root.Values.modelVolume.existingClaim }}
    - name: models
      persistentVolumeClaim: {claimName: {{ . }}, readOnly: true}
    {{- end }}
{{- end -}}
