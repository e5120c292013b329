{{- define "killswitch-sidecar.exampleName" -}}
{{- printf "%s-example" (include "killswitch.fullname" .) -}}
{{- end }}

{{- define "killswitch-sidecar.exampleLabels" -}}
app.kubernetes.io/name: killswitch-example
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}
