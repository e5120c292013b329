{{- define "killswitch-sidecar.exampleName" -}}
{{- printf "%s-example" (include "killswitch.fullname" .) -}}
{{- end }}

{{- define "killswitch-sidecar.exampleLabels" -}}
app.kubernetes.io/name: killswitch-example
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{/* What the containers of `helm test` have in common. */}}
{{- define "killswitch-sidecar.testContainer" -}}
image: {{ include "killswitch.image" . | quote }}
imagePullPolicy: {{ .Values.killswitch.image.pullPolicy }}
resources:
  limits: {memory: 128Mi}
  requests: {cpu: 50m, memory: 64Mi}
securityContext:
  {{- include "killswitch.securityContext" . | nindent 2 }}
{{- end }}
